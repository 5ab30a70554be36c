"""JSON Schemas of the configuration files, for editors that check a file while it is typed."""

from comms.errors import ConfigError
from orchestrator.config.hardware.cluster_file import ClusterFile
from orchestrator.config.job_file import JobFile
from orchestrator.config.schema import Section, nearest

_FILES: dict[str, type[Section]] = {"cluster": ClusterFile, "job": JobFile}


def json_schema(kind: str) -> dict[str, object]:
    """The JSON Schema of `cluster` or `job` files."""
    if kind not in _FILES:
        raise ConfigError(f"no schema for {kind!r}", "json_schema", nearest(kind, tuple(_FILES)))
    schema = _FILES[kind].model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
