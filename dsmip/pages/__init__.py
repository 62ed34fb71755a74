"""Pages that are one file and open without a server: their style, their templates, their thumbnails."""
