"""What is wrong with a dataset directory: counts, coverage, ambiguity and leaks, as tables, JSON and a page.

read -> `columns` (numbers only), judged by `texts`, `pictures` and `batches`, put together by `report`, shown by `page`.
"""
