"""Suites: experiments named in a file, their members and steps, and the tables, tests and pages of their figures."""
