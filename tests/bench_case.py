"""What every report of a bench must have."""

import json

from fdpp_jax.plans import device


def check_report(report, names, path) -> dict:
    """The record of a report with a line per name."""
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert [name for name in names if not any(row[0].startswith(name) for row in report.rows)] == []
    report.save(path)
    record = json.loads(path.read_text())
    assert record["device"]["kind"] == device.current().kind
    assert {"jax", "jaxlib", "flax", "fdpp_jax"} <= set(record["versions"])
    assert {"date", "commit"} <= set(record)
    return record
