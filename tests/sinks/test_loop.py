"""The sink against real brokers and a real ClickHouse: follows, restarts, waits, finds its place, never guesses."""

from __future__ import annotations

import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import NewTopic

from billing import chain, replay
from billing.founding import found_again
from billing.v1.account_pb2 import Progress
from billing.v1.ledger_pb2 import LedgerRecord
from sinks import queries
from sinks.audit import audit
from sinks.engine import Columns, Table
from sinks.engines.chdb import ChdbEngine
from sinks.errors import EngineUnavailable, LedgerError, LedgerGap
from sinks.follow import feed
from sinks.loop import run_sink
from sinks.settings import SinkSettings
from sinks.status import SinkStatus
from taximeter.embedded.broker import TansuBroker, TansuSettings
from taximeter.embedded.process import Child, ChildError
from tests.billing.ledgers import KEYS, NOW_MS, SEAL_KEY, Ledger, batch, tenants_in, usage
from tests.producers.support import create_topics, ordered_producer, wait_until

# Now and then the client itself ends with SIGSEGV where the embedded broker comes back having forgotten: that gives a
# topic's ID as zero, and librdkafka (2.16, `rd_kafka_metadata_update_op`) then compares a name that is not there.
CLIENT_CRASHED = "ended with exit code -11"
PARTITION = 1
TENANT = tenants_in(PARTITION)[0]
ROOT = Path(__file__).parents[2]
WAIT_S = 180.0


def make_topics(bootstrap: str, prefix: str, partitions: int = 4) -> SinkSettings:
    settings = SinkSettings(
        bootstrap,
        ledger_topic=f"{prefix}.usage.ledger",
        progress_topic=f"{prefix}.usage.progress",
        seal_key=KEYS.seal_key,
        partitions=(PARTITION,),
        linger_ms=20,
    )
    create_topics(bootstrap, *(NewTopic(name, partitions, 1) for name in (settings.ledger_topic, settings.progress_topic)))
    return settings


def produce(settings: SinkSettings, records: list[bytes]) -> None:
    producer = ordered_producer(settings.bootstrap)
    for stored in records:
        producer.produce(settings.ledger_topic, stored, partition=PARTITION)
    assert producer.flush(60) == 0


@contextmanager
def running(settings: SinkSettings, engine: ChdbEngine, status: SinkStatus | None = None) -> Iterator[SinkStatus]:
    """A sink on a thread; what ended it is raised when the block ends, however that ends."""
    stop, status = threading.Event(), status or SinkStatus()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            run_sink(settings, engine, stop, status)
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield status
    finally:
        stop.set()
        thread.join(WAIT_S)
        if errors:
            raise errors[0]
    assert not thread.is_alive()


def fails(settings: SinkSettings, engine: ChdbEngine) -> BaseException:
    """What a sink that must not go on raises."""
    with pytest.raises(LedgerError) as caught:
        run_sink(settings, engine, threading.Event())
    return caught.value


def filled(requests: int = 3) -> Ledger:
    ledger = Ledger(PARTITION)
    ledger.price()
    ledger.tenant(TENANT)
    for _ in range(requests):
        ledger.usage(batch([usage(uuid.uuid4().hex, TENANT) for _ in range(10)]))
    return ledger


def carried_on(ledger: Ledger, generation: bytes = b"h" * 16) -> Ledger:
    """The ledger after a broker forgot it: a new generation on the same state."""
    again = Ledger(PARTITION)
    record, stored = found_again(ledger.state, generation, NOW_MS, KEYS.seal_key, "test")
    again.state = ledger.state
    again.stored = [stored]
    replay.apply(again.state, record, stored)
    return again


@pytest.fixture
def _no_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the sink stands still behind a record that is not ours, it does not look at it a second time."""
    monkeypatch.setattr("sinks.loop._DOUBT_S", 3_600.0)


@pytest.mark.usefixtures("_no_doubts")
def test_follows_the_ledger_and_goes_on_after_a_restart(
    bootstrap: str, unique_name: Callable[[str], str], engine: ChdbEngine
) -> None:
    settings = make_topics(bootstrap, unique_name("follow"))
    ledger = filled()
    produce(settings, ledger.stored)
    with running(settings, engine) as status:
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
    assert queries.totals(engine).events == 30
    written = len(ledger.stored)
    ledger.usage(batch([usage("late", TENANT)]))
    # A zombie writes the last record again before the new one comes.
    produce(settings, [ledger.stored[written - 1], *ledger.stored[written:]])
    with running(settings, engine) as status:
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
        assert status.snapshot()["ignored_records"] == {str(PARTITION): 1}
        # Said after it is stored, and by a sink that ends only for so long.
        wait_until(lambda: last_progress(settings).position.sequence == ledger.state.sequence, "its progress said")
    assert queries.totals(engine).events == 31
    [fresh] = queries.freshness(engine)
    assert fresh.record_hash == ledger.state.record_hash.hex()
    assert fresh.ledger_offset == len(ledger.stored)
    progress = last_progress(settings)
    assert progress.reader == "sink/clickhouse"
    assert progress.position.sequence == ledger.state.sequence
    assert progress.record_hash == ledger.state.record_hash
    assert progress.ledger_offset == len(ledger.stored)


def last_progress(settings: SinkSettings) -> Progress:
    consumer = Consumer(
        {"bootstrap.servers": settings.bootstrap, "group.id": "test", "enable.partition.eof": True, "fetch.wait.max.ms": 20}
    )
    consumer.assign([TopicPartition(settings.progress_topic, PARTITION, 0)])
    last = b""
    while True:
        message = consumer.poll(WAIT_S)
        assert message is not None
        error = message.error()
        if error is not None:
            assert error.code() == KafkaError._PARTITION_EOF, error
            break
        assert message.key() == f"reader/sink/clickhouse/{PARTITION}".encode()
        last = message.value() or b""
    consumer.close()
    return Progress.FromString(last)


def test_the_ledger_grows_while_the_sink_runs(bootstrap: str, unique_name: Callable[[str], str], engine: ChdbEngine) -> None:
    settings = make_topics(bootstrap, unique_name("grows"))
    ledger = filled(1)
    with running(settings, engine) as status:
        produce(settings, ledger.stored)
        for number in range(5):
            assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
            ledger.usage(batch([usage(f"more-{number}", TENANT)]))
            produce(settings, ledger.stored[-1:])
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
    assert queries.totals(engine).events == 15


class Flaky:
    """An engine that is away while `away` is set, for threads of that name; everything else is the real one's."""

    def __init__(self, engine: ChdbEngine, for_threads: str = "") -> None:
        self.engine = engine
        self.for_threads = for_threads
        self.away = threading.Event()
        self.refused = threading.Event()
        self.query = engine.query
        self.execute = engine.execute
        self.close = engine.close

    def insert(self, table: Table, columns: Columns) -> int:
        if self.away.is_set() and threading.current_thread().name.startswith(self.for_threads):
            self.refused.set()
            raise EngineUnavailable("away")
        return self.engine.insert(table, columns)


def test_waits_while_clickhouse_is_away(tansu: TansuBroker, unique_name: Callable[[str], str], engine: ChdbEngine) -> None:
    settings = make_topics(tansu.bootstrap, unique_name("away"))
    flaky = Flaky(engine)
    flaky.away.set()
    ledger = filled(5)
    produce(settings, ledger.stored)
    with running(settings, flaky) as status:  # type: ignore[arg-type]  # it has what the sink calls
        assert flaky.refused.wait(WAIT_S)
        assert queries.totals(engine).events == 0
        # What was refused first may have been balances that are shown early, for which nobody waits.
        wait_until(lambda: "away" in str(status.snapshot()["waiting_for"]), "the batch waiting")
        flaky.away.clear()
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
    assert queries.totals(engine).events == 50


def test_balances_are_shown_before_their_batch(
    tansu: TansuBroker, unique_name: Callable[[str], str], engine: ChdbEngine
) -> None:
    settings = make_topics(tansu.bootstrap, unique_name("preview"))
    ledger = filled(3)
    produce(settings, ledger.stored)
    shown = []
    for _ in range(2):
        # As after a crash of the first sink: nothing but balances was written, and the second one does all of it again.
        with running(replace(settings, linger_ms=60_000, collect_ms=60_000, preview_ms=10), engine) as status:
            wait_until(lambda: [each.events for each in queries.balances(engine, TENANT)] == [30], "all balances shown")
            assert status.snapshot()["positions"] == {}
        shown = queries.balances(engine, TENANT)
        assert [(balance.events, balance.spend_pico) for balance in shown] == [(30, ledger.state.accounts[TENANT].spend_pico)]
        assert queries.totals(engine).events == 0
        assert queries.freshness(engine) == []
    with running(settings, engine) as status:
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
    assert queries.totals(engine).events == 30
    assert queries.balances(engine, TENANT) == shown


class Noting(SinkStatus):
    """Remembers all that it was ever told to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def waiting(self, reason: str) -> None:
        self.reasons.append(reason)
        super().waiting(reason)


def test_balances_that_cannot_be_shown_come_with_their_batch(
    tansu: TansuBroker, unique_name: Callable[[str], str], engine: ChdbEngine
) -> None:
    settings = replace(make_topics(tansu.bootstrap, unique_name("unshown")), linger_ms=1_000, preview_ms=0)
    flaky, status = Flaky(engine, for_threads="sink-preview"), Noting()
    flaky.away.set()
    ledger = filled(3)
    produce(settings, ledger.stored)
    with running(settings, flaky, status):  # type: ignore[arg-type]  # it has what the sink calls
        assert flaky.refused.wait(WAIT_S)
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
    assert not any("away" in reason for reason in status.reasons), "nobody waits for what is only shown early"
    assert [balance.events for balance in queries.balances(engine, TENANT)] == [30]


def test_a_new_generation_that_carries_on_is_entered(
    bootstrap: str, unique_name: Callable[[str], str], engine: ChdbEngine
) -> None:
    settings = make_topics(bootstrap, unique_name("before"))
    ledger = filled()
    produce(settings, ledger.stored)
    with running(settings, engine) as status:
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
    # The same minute of the same tenant, in windows of the new generation, whose sequence numbers begin again.
    again = carried_on(ledger)
    again.tick(NOW_MS)
    again.usage(batch([usage(f"again-{number}", TENANT) for number in range(7)]))
    recreated = make_topics(bootstrap, unique_name("after"))
    produce(recreated, again.stored)
    with running(recreated, engine) as status:
        assert status.wait_for({PARTITION: again.state.sequence}, WAIT_S)
        # Positions of the old generation have larger numbers; wait until the new one is there.
        assert status.wait_for({PARTITION: again.state.sequence}, WAIT_S)
        wait_until(lambda: queries.freshness(engine)[0].generation == (b"h" * 16).hex(), "the new generation")
    assert queries.totals(engine).events == 37
    [balance] = queries.balances(engine, TENANT)
    assert balance.events == 37
    assert balance.spend_pico == queries.totals(engine).cost_pico["USD"]


def test_a_broker_that_forgot_is_noticed_by_a_running_sink(
    tmp_path: Path, engine: ChdbEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A sink that looks between the topics and their first record finds an empty log, and ends: this one looks behind it.
    monkeypatch.setattr("sinks.loop._SILENCE_S", 3_600.0)
    broker = TansuBroker(TansuSettings(log_path=tmp_path / "broker.log"))
    broker.start()
    settings = make_topics(broker.bootstrap, "forgot")
    ledger = filled()
    produce(settings, ledger.stored)
    with running(settings, engine) as status:
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
        port = int(broker.bootstrap.rpartition(":")[2])
        broker.stop()
        again = carried_on(ledger)
        again.usage(batch([usage("again", TENANT)]))
        broker = TansuBroker(TansuSettings(log_path=tmp_path / "broker2.log", port=port))
        broker.start()
        make_topics(broker.bootstrap, "forgot")
        produce(settings, again.stored)
        monkeypatch.setattr("sinks.loop._SILENCE_S", 0.5)
        wait_until(lambda: queries.freshness(engine)[0].generation == (b"h" * 16).hex(), "the new log found")
    broker.stop()
    assert queries.totals(engine).events == 31


def test_a_gap_is_named_and_feed_closes_it(tansu: TansuBroker, unique_name: Callable[[str], str], engine: ChdbEngine) -> None:
    settings = make_topics(tansu.bootstrap, unique_name("gap"))
    ledger = filled()
    feed(engine, ledger.stored[:-1], KEYS.seal_key)
    again = carried_on(ledger)
    missing = ledger.stored[-1]
    produce(settings, again.stored)
    error = fails(settings, engine)
    assert isinstance(error, LedgerGap)
    assert error.position == f"generation {(b'g' * 16).hex()[:12]}, sequence {len(ledger.stored) - 2}"
    assert error.needed == f"generation {(b'g' * 16).hex()[:12]}, sequence {len(ledger.stored) - 1}"
    assert error.position in str(error)
    assert error.needed in str(error)
    # Handing over everything again is as good as handing over what is missing.
    [position] = feed(engine, [*ledger.stored[:-1], missing], KEYS.seal_key).values()
    assert position.record_hash == chain.record_hash(missing)
    with running(settings, engine):
        wait_until(lambda: queries.freshness(engine)[0].generation == (b"h" * 16).hex(), "the new generation")
    assert queries.totals(engine).events == 30


@pytest.mark.parametrize(
    ("held", "in_log", "says"),
    [
        pytest.param(slice(None), slice(0, 2), "the log ends at", id="ends before"),
        pytest.param(slice(0, 2), slice(4, None), "the log starts at", id="starts after"),
        pytest.param(slice(0, 0), slice(3, None), "this database is empty", id="empty database, no beginning"),
        pytest.param(slice(None), slice(0, 0), "the log is empty", id="empty log"),
    ],
)
def test_a_log_that_does_not_fit_stops_the_sink(
    tansu: TansuBroker, unique_name: Callable[[str], str], engine: ChdbEngine, held: slice, in_log: slice, says: str
) -> None:
    settings = make_topics(tansu.bootstrap, unique_name("unfit"))
    ledger = filled()
    feed(engine, ledger.stored[held], KEYS.seal_key)
    produce(settings, ledger.stored[in_log])
    assert says in str(fails(settings, engine))


def test_another_installations_log_is_refused(
    tansu: TansuBroker, unique_name: Callable[[str], str], engine: ChdbEngine
) -> None:
    settings = make_topics(tansu.bootstrap, unique_name("other"))
    feed(engine, filled().stored, KEYS.seal_key)
    other = Ledger(PARTITION)
    other.tick(NOW_MS)
    record = other.stored[0].replace(b"g" * 16, b"o" * 16)
    produce(settings, [chain.seal(unsealed(record), KEYS.seal_key)])
    assert "belongs to another installation" in str(fails(settings, engine))


def unsealed(stored: bytes) -> LedgerRecord:
    record = LedgerRecord.FromString(stored)
    record.ClearField("seal")
    return record


def test_a_damaged_record_stops_the_sink(tansu: TansuBroker, unique_name: Callable[[str], str], engine: ChdbEngine) -> None:
    settings = make_topics(tansu.bootstrap, unique_name("damaged"))
    ledger = filled()
    *before, damaged, last = ledger.stored
    produce(settings, [*before, damaged[:-1] + bytes([damaged[-1] ^ 1]), last])
    with pytest.raises(chain.UnreadableRecord, match="it was damaged"):
        run_sink(settings, engine, threading.Event())


@pytest.mark.usefixtures("_no_doubts")
def test_a_forged_record_is_refused_and_told_and_the_real_one_is_written(
    tansu: TansuBroker, unique_name: Callable[[str], str], engine: ChdbEngine, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_topics(tansu.bootstrap, unique_name("forged"))
    ledger = filled()
    *before, last = ledger.stored
    forged = unsealed(last)
    forged.accounts[0].credit.low = 10**18
    produce(settings, [*before, chain.seal(forged, b"x" * 32), b"\xff garbage", b"", last])
    status = SinkStatus()
    stop = threading.Event()
    running = threading.Thread(target=run_sink, args=(settings, engine, stop, status))
    running.start()
    try:
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
    finally:
        stop.set()
        running.join()
    assert status.snapshot()["refused_records"] == {str(PARTITION): 3}
    assert caplog.text.count("was refused: ") == 3
    assert audit(engine, KEYS.seal_key).findings == []


def test_a_sink_with_another_seal_key_stops(tansu: TansuBroker, unique_name: Callable[[str], str], engine: ChdbEngine) -> None:
    settings = make_topics(tansu.bootstrap, unique_name("other-key"))
    ledger = filled()
    produce(settings, ledger.stored)
    other = replace(settings, seal_key=b"x" * 32)
    assert "sealed with another key than this sink's" in str(fails(other, engine))
    feed(engine, ledger.stored[:3], KEYS.seal_key)
    assert "sealed with another key than this sink's" in str(fails(other, engine))


def cut_and_written_on_under_a_sink(folder: Path) -> str:
    """What ended a sink whose log was cut and written on while it was away for so long that it never saw the log shorter."""
    folder.mkdir()
    broker = TansuBroker(TansuSettings(log_path=folder / "broker.log"))
    broker.start()
    settings = make_topics(broker.bootstrap, "cut")
    ledger, cut = filled(), filled(6)
    assert cut.stored[:3] == ledger.stored[:3], "founding, prices and tenant"
    produce(settings, ledger.stored)
    arguments = [broker.bootstrap, "cut.", str(folder / "chdb"), SEAL_KEY.hex()]
    argv = [sys.executable, "-m", "tests.sinks.loop_process", *arguments]
    sink = Child("sink", argv, log_path=folder / "sink.log", cwd=ROOT)
    sink.start()
    try:
        sink.wait_until(lambda: last_progress(settings).ledger_offset == len(ledger.stored) - 1, WAIT_S)
        sink.pause()
        broker.stop()
        port = int(broker.bootstrap.rpartition(":")[2])
        broker = TansuBroker(TansuSettings(log_path=folder / "broker2.log", port=port))
        broker.start()
        make_topics(broker.bootstrap, "cut")
        produce(settings, cut.stored)
        sink.resume()
        with pytest.raises(ChildError) as ended:
            sink.wait_until(lambda: False, WAIT_S)
        if CLIENT_CRASHED in str(ended.value):
            # Whoever looks after it starts it again: then it looks for its place before anything else.
            sink.start()
            with pytest.raises(ChildError, match="the log holds another record at"):
                sink.wait_until(lambda: False, WAIT_S)
        return f"{ended.value}\n{sink.log_tail()}"
    finally:
        sink.kill9()
        broker.stop()


@pytest.mark.timeout(900)
def test_a_log_that_was_cut_and_written_on_stops_a_running_sink(tmp_path: Path) -> None:
    """Of the same generation, and longer than what the sink has read: what comes looks like a zombie's, record after record."""
    trials = (cut_and_written_on_under_a_sink(tmp_path / str(number)) for number in range(8))
    said = next(said for said in trials if CLIENT_CRASHED not in said)
    assert "the log holds another record at" in said
    assert "records that do not follow ours" in said
