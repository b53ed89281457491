"""One flat vector is the adapter: what it consists of (`content`), where that stands (`layout`), what it gives rows."""
