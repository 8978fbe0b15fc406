"""Work beside the request: queues, threads, and handles to wait for them."""
