"""Programs that tests start as several processes."""
