"""Installing dvora as a stranger does: its wheel in an empty environment, and the oldest and the newest versions."""
