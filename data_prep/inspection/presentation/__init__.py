"""How an inspection is shown: `tables` are the same for a terminal and for the page, `page` writes the page."""
