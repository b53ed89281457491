"""What can be done with an adapter's folder."""
