"""Checks of a dataset directory: counts, coverage, ambiguity and leaks (inspect), damage (verify).

`columns` reads numbers only; `texts`, `images` and `batches` judge; `report` puts together; `tables` and `page` show.
`verification` compares every file with the manifest and every sample with its record.
"""
