"""Sequences, and the requests that a stop means, are a tenant's own."""

from __future__ import annotations

import pytest
from tritonclient.grpc import service_pb2

from serving import kserve
from serving.gateway.scoping import RunningRequests, SequenceScope

SCOPE = SequenceScope(b"pepper" * 6)


def renamed(named: int | str, tenant_id: str = "tenant-a", scope: SequenceScope = SCOPE) -> object:
    request = service_pb2.ModelInferRequest()
    kserve.set_parameter(request, "sequence_id", named)
    scope.apply(request, tenant_id)
    return kserve.get_parameter(request, "sequence_id")


@pytest.mark.parametrize("named", [7, 2**63, "chat"])
def test_a_sequence_keeps_its_type_and_is_another_for_each_tenant(named: int | str) -> None:
    assert type(renamed(named)) is type(named)
    assert renamed(named) == renamed(named, scope=SequenceScope(b"pepper" * 6)) != named
    assert len({renamed(named), renamed(named, "tenant-b"), renamed(named, scope=SequenceScope(b"other" * 8))}) == 3


def test_lengths_keep_tenant_and_name_apart() -> None:
    assert renamed("bc", "a") != renamed("c", "ab")
    assert renamed(7) != renamed("7")


@pytest.mark.parametrize("named", [0, ""])
def test_no_sequence_stays_none(named: int | str) -> None:
    assert renamed(named) == named


def test_a_clients_id_means_its_own_newest_request_that_runs() -> None:
    running = RunningRequests()
    running.add("a", "same", "1")
    running.add("a", "same", "2")
    running.add("b", "same", "3")
    running.add("a", "", "4")
    assert [running.newest(tenant, "same") for tenant in "abc"] == ["2", "3", None]
    assert running.newest("a", "") is None
    running.remove("a", "same", "2")
    running.remove("a", "same", "2")
    assert running.newest("a", "same") == "1"
    running.remove("a", "same", "1")
    assert running.newest("a", "same") is None
