"""What is wrong with a dataset directory: counts, coverage, ambiguity and leaks, as tables, JSON and a page.

`columns` reads (numbers only), `texts`, `pictures` and `batches` judge, `report` puts together, `tables` and `page`
show.
"""
