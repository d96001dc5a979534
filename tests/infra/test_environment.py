"""Package versions and machine facts for results files."""

from __future__ import annotations

import os
import platform

import numpy as np

from personaplug.infra.environment import machine_info, package_versions


def test_package_versions_include_python_and_mark_missing_packages() -> None:
    versions = package_versions(("numpy", "no-such-package"))
    assert versions == {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "no-such-package": "not installed",
    }
    assert {"personaplug", "torch", "transformers", "accelerate"} <= package_versions().keys()


def test_machine_info_includes_processor_and_cores() -> None:
    info = machine_info()
    assert info["processor"]
    assert info["cores"] == os.cpu_count()
    assert info["threads"] >= 1
