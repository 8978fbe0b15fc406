"""Work in the background: queues, threads, and handles to wait for it."""
