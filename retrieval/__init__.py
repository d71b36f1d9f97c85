"""Which general text helps: BM25 over a corpus store. Imports `tasks` only."""
