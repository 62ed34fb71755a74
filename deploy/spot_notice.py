"""Passes AWS's notice that a spot machine will be taken away in two minutes on to Ray: trainings save, and leave it.

    python deploy/spot_notice.py HEAD:6379

Runs beside Ray on the machine (cluster.yaml starts it on every worker) until the notice has come. Without it Ray learns
of the loss when the machine is gone. AWS: "Spot Instance interruption notices" in the EC2 user guide.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime

SERVICE = "http://169.254.169.254"  # of the machine's metadata, the same on every machine
_LOOK_SECONDS = 5.0  # as AWS recommends
_ANSWER_SECONDS = 2.0
_TOKEN_SECONDS = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Waits for the notice and drains this machine's node; returns the exit code of `ray drain-node`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the cluster's head, with its port")
    parser.add_argument("--service", default=SERVICE, help="of the machine's metadata (default: %(default)s)")
    options = parser.parse_args(arguments)
    while (end := stop_time(options.service)) is None:
        time.sleep(_LOOK_SECONDS)
    seconds = max(int((end - datetime.now(UTC)).total_seconds()), 0)
    print(f"this machine stops in {seconds} s", flush=True)
    return drain(options.address, seconds)


def stop_time(service: str) -> datetime | None:
    """When this machine will be stopped; None when it will not, or when the service does not answer."""
    try:
        token = _ask(service, "api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)})
        notice = json.loads(
            _ask(service, "meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token.decode()})
        )
        return datetime.fromisoformat(notice["time"])
    except (OSError, ValueError):  # 404, an OSError: no notice
        return None


def drain(address: str, seconds: int) -> int:
    """Tells Ray that the node of this machine goes in so many seconds; it takes no new work, and trainings are told."""
    import ray

    ray.init(address, log_to_driver=False)
    node = ["--address", address, "--node-id", ray.get_runtime_context().get_node_id()]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine taken away"]
    command = ["drain-node", *node, *reason, "--deadline-remaining-seconds", str(seconds)]
    return subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command], check=False).returncode


def _ask(service: str, name: str, method: str, headers: dict[str, str]) -> bytes:
    request = urllib.request.Request(f"{service}/latest/{name}", method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
        content: bytes = answer.read()
    return content


if __name__ == "__main__":
    sys.exit(main())
