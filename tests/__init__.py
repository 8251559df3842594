"""The tests; they mirror the packages `parchgrad` and `service`."""
