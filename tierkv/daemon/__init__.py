"""The process that shares one warm cache among others, the protocol it speaks, and the client's end of it."""
