"""What each task trains, and its metrics."""
