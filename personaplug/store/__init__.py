"""Users' live histories in SQLite or PostgreSQL."""
