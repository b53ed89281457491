"""Installing dvora as a new user does: its wheel in an empty environment, and the oldest and the newest versions."""
