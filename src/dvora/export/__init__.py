"""Other formats and runtimes: graphs that take an adapter as an input, and what must be merged for runtimes without."""
