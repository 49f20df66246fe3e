"""Commands: each parses, builds, runs. The only place that knows every package."""
