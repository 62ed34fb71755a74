"""Cluster: the connection, resources, tasks, failures and events."""
