"""What this host can do, measured rather than read off names. Nothing here prints; ``survey`` gathers all of it."""
