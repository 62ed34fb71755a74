"""The job `dsmip plan`, in this process: probe, forecast and its tables. Starts no Ray."""
