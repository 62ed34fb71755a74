"""Serving: a linker behind HTTP: links, entities, a reconciliation service for OpenRefine, and a page for people."""
