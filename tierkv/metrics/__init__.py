"""What tierkv shows to Prometheus: the list of all metrics, and their text. Loads no torch."""
