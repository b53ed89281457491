"""Room of what rebuilds and examines adapted models."""
