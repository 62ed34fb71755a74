"""Measurements that stay in the repository; nothing imports them but their tests."""
