"""What was measured: exactness, support, speed, memory, quality and start-up, and the pages that show it."""
