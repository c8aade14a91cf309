-- What the sink writes. Every statement may run twice.
--
-- Every table is a ReplacingMergeTree: a row that is written again (a crash between two inserts, a replay) replaces itself.
-- `version` orders what is said about one key: (ordinal of the ledger generation << 40) | sequence of the ledger record.
-- Money is Decimal(38, 12), exact: one unit of the last decimal is one pico.
-- A part below 100 MiB is one packed file: an insert then makes and syncs one file, not a dozen (a hundred, of usage_events),
-- which is most of what a small insert costs. Older servers know the setting and keep their parts as they do.
-- No partition key takes part of a key away from its duplicates: a partition is a function of the key, or there is none.

CREATE TABLE IF NOT EXISTS usage_events
(
    tenant_id LowCardinality(String) COMMENT 'Who pays',
    request_id String COMMENT 'Assigned by the metering point; with tenant_id the identity that is charged once',
    project_id LowCardinality(String) COMMENT 'The tenant''s project',
    user_id String COMMENT 'The tenant''s end user',
    api_key_id LowCardinality(String) COMMENT 'The key that was used, never its secret',
    model LowCardinality(String) COMMENT 'What was run',
    operation LowCardinality(String) COMMENT 'generate, chat, embeddings, ...',
    service_class LowCardinality(String) COMMENT 'standard, priority, batch',
    outcome LowCardinality(String) COMMENT 'completed, cancelled, ...; rejected and backend_error are kept at price 0',
    count_source LowCardinality(String) COMMENT 'Who counted: backend, tokenizer, estimate',
    started DateTime64(3, 'UTC') COMMENT 'Event time: the request came' CODEC(DoubleDelta, ZSTD(1)),
    ended DateTime64(3, 'UTC') COMMENT 'Event time: the usage ended; windows and prices go by it' CODEC(DoubleDelta, ZSTD(1)),
    uncached_input_tokens UInt64 COMMENT 'Classes of tokens are disjoint: prompt tokens = uncached + cache read + cache write' CODEC(ZSTD(1)),
    output_tokens UInt64 COMMENT 'Without reasoning tokens' CODEC(ZSTD(1)),
    cache_read_tokens UInt64 COMMENT 'Input tokens read from a cache' CODEC(ZSTD(1)),
    cache_write_tokens UInt64 COMMENT 'Input tokens written to a cache' CODEC(ZSTD(1)),
    reasoning_tokens UInt64 COMMENT 'Output tokens of reasoning' CODEC(ZSTD(1)),
    image_input_tokens UInt64 COMMENT 'Input tokens of images' CODEC(ZSTD(1)),
    audio_input_tokens UInt64 COMMENT 'Input tokens of sound' CODEC(ZSTD(1)),
    audio_output_tokens UInt64 COMMENT 'Output tokens of sound' CODEC(ZSTD(1)),
    unit_names Array(LowCardinality(String)) COMMENT 'What is not text: characters, audio_ms, image_steps, requests',
    unit_quantities Array(UInt64) COMMENT 'Beside unit_names',
    cost Decimal(38, 12) COMMENT 'What it cost, in currency, exactly' CODEC(ZSTD(1)),
    currency LowCardinality(String) COMMENT 'Of cost',
    price_version UInt32 COMMENT 'The price book version that rated it; 0: no price, kept unrated' CODEC(ZSTD(1)),
    tokenizer LowCardinality(String) COMMENT 'Which tokenizer counted, where the back end did not',
    context_tokens UInt64 COMMENT 'How many tokens of context the model saw' CODEC(ZSTD(1)),
    time_to_first_token_ms UInt32 COMMENT 'From the request to the first token' CODEC(ZSTD(1)),
    latency_ms UInt32 COMMENT 'From the request to the end of the answer' CODEC(ZSTD(1)),
    server_id LowCardinality(String) COMMENT 'Which server ran it',
    region LowCardinality(String) COMMENT 'Where',
    client_request_id String COMMENT 'The client''s own ID, for tracing; never decides what is charged',
    refusal_reason LowCardinality(String) COMMENT 'Why the gateway refused, where outcome is rejected',
    backfill UInt8 COMMENT '1: older than the dedupe horizon on purpose',
    attribute_names Array(String) COMMENT 'Free attributes',
    attribute_values Array(String) COMMENT 'Beside attribute_names',
    producer_id LowCardinality(String) COMMENT 'Who counted',
    producer_sequence UInt64 COMMENT 'Its number of this event, without gaps in a partition; 0: does not number' CODEC(DoubleDelta, ZSTD(1)),
    accepted DateTime64(3, 'UTC') COMMENT 'Log time of the ledger record' CODEC(DoubleDelta, ZSTD(1)),
    ledger_partition UInt32 COMMENT 'Where it stands in the ledger: partition' CODEC(ZSTD(1)),
    generation LowCardinality(String) COMMENT 'Where it stands in the ledger: generation of the log, hexadecimal',
    sequence UInt64 COMMENT 'Where it stands in the ledger: number of the record' CODEC(DoubleDelta, ZSTD(1)),
    record_index UInt32 COMMENT 'Where it stands in the ledger: index in the record''s input batch' CODEC(ZSTD(1)),
    version UInt64 COMMENT 'Order of ledger positions: the highest version of a key is the row' CODEC(DoubleDelta, ZSTD(1)),
    INDEX ended_range ended TYPE minmax GRANULARITY 1
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, request_id)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Every accepted usage event with its cost, one row per (tenant_id, request_id). Read it through usage_events_current';

CREATE TABLE IF NOT EXISTS usage_totals
(
    tenant_id LowCardinality(String) COMMENT 'Who pays',
    minute DateTime('UTC') COMMENT 'Event time: the minute in which the usage ended' CODEC(DoubleDelta, ZSTD(1)),
    project_id LowCardinality(String) COMMENT 'The tenant''s project',
    model LowCardinality(String) COMMENT 'What was run',
    operation LowCardinality(String) COMMENT 'generate, chat, embeddings, ...',
    service_class LowCardinality(String) COMMENT 'standard, priority, batch',
    ledger_partition UInt32 COMMENT 'Where the window is kept',
    generation LowCardinality(String) COMMENT 'The ledger generation in which the window was opened and kept',
    opened_sequence UInt64 COMMENT 'The ledger record that opened it: late usage may open another one for the same minute, and sums add them',
    events UInt64 COMMENT 'Accepted events' CODEC(ZSTD(1)),
    refused_events UInt64 COMMENT 'Of those, at price 0 and in no quantity here: refused by a gateway, or nothing was delivered' CODEC(ZSTD(1)),
    unrated_events UInt64 COMMENT 'Of those, without a price' CODEC(ZSTD(1)),
    uncached_input_tokens UInt64 CODEC(ZSTD(1)),
    output_tokens UInt64 CODEC(ZSTD(1)),
    cache_read_tokens UInt64 CODEC(ZSTD(1)),
    cache_write_tokens UInt64 CODEC(ZSTD(1)),
    reasoning_tokens UInt64 CODEC(ZSTD(1)),
    image_input_tokens UInt64 CODEC(ZSTD(1)),
    audio_input_tokens UInt64 CODEC(ZSTD(1)),
    audio_output_tokens UInt64 CODEC(ZSTD(1)),
    unit_names Array(LowCardinality(String)) COMMENT 'What is not text',
    unit_quantities Array(UInt64) COMMENT 'Beside unit_names',
    cost Decimal(38, 12) COMMENT 'Absolute, exact' CODEC(ZSTD(1)),
    currency LowCardinality(String) COMMENT 'Of cost',
    sequence UInt64 COMMENT 'The ledger record that stated this total' CODEC(ZSTD(1)),
    version UInt64 COMMENT 'Order of ledger positions: the highest version of a key is the row' CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree(version)
PARTITION BY toYear(minute)
ORDER BY (tenant_id, minute, project_id, model, operation, service_class, ledger_partition, generation, opened_sequence)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Absolute totals of one-minute windows; replaced, never added to. Read it through tenant_usage_minutes or tenant_usage_daily';

CREATE TABLE IF NOT EXISTS accounts
(
    tenant_id String COMMENT 'Who pays',
    display_name String COMMENT 'For people',
    status LowCardinality(String) COMMENT 'unknown (nobody created it), active, suspended, closed',
    currency LowCardinality(String) COMMENT 'Of all amounts here',
    credit Decimal(38, 12) COMMENT 'All that was ever granted',
    spend Decimal(38, 12) COMMENT 'All that was ever charged',
    events UInt64 COMMENT 'Accepted events',
    duplicates UInt64 COMMENT 'Events that came again and were not charged again',
    conflicts UInt64 COMMENT 'Events under a known ID with another payload: never charged, see rejected',
    unrated_events UInt64 COMMENT 'Accepted events without a price',
    plan_id LowCardinality(String) COMMENT 'The plan',
    billing_mode LowCardinality(String) COMMENT 'prepaid, postpaid',
    prompt_tokens_max UInt64 COMMENT 'Of the plan; 0: no limit',
    credit_limit Decimal(38, 12) COMMENT 'Of the plan; 0: no limit',
    log_time DateTime64(3, 'UTC') COMMENT 'Log time of the record that stated this',
    ledger_partition UInt32 COMMENT 'Where the account is kept',
    generation LowCardinality(String) COMMENT 'The ledger generation that stated this',
    sequence UInt64 COMMENT 'The ledger record that stated this',
    version UInt64 COMMENT 'Order of ledger positions: the highest version of a key is the row'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY tenant_id
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'The state of each account, absolute. Read it through tenant_balances';

CREATE TABLE IF NOT EXISTS alerts
(
    tenant_id String COMMENT 'Whom it concerns; empty: the system',
    alert_id String COMMENT 'Stable: the same cause has the same ID',
    rule LowCardinality(String) COMMENT 'prompt_over_limit, token_burst, ...',
    severity LowCardinality(String) COMMENT 'info, warning, critical',
    raised DateTime64(3, 'UTC') COMMENT 'Log time',
    summary String COMMENT 'One sentence for a person',
    request_ids Array(String) COMMENT 'What shows it',
    figure_names Array(String) COMMENT 'What shows it: figures by name',
    figure_values Array(Int64) COMMENT 'Beside figure_names',
    label_names Array(String) COMMENT 'Names that the rule saw',
    label_values Array(String) COMMENT 'Beside label_names',
    ledger_partition UInt32 COMMENT 'The ledger record that raised it',
    generation LowCardinality(String) COMMENT 'The ledger record that raised it',
    sequence UInt64 COMMENT 'The ledger record that raised it',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, alert_id)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'What somebody should know. Read it through alerts_recent';

CREATE TABLE IF NOT EXISTS rejected
(
    ledger_partition UInt32 COMMENT 'The ledger record that says so',
    generation LowCardinality(String) COMMENT 'The ledger record that says so',
    sequence UInt64 COMMENT 'The ledger record that says so',
    record_index Int32 COMMENT 'Which event of the batch; -1: the whole input message',
    tenant_id String COMMENT 'Empty where it could not be read',
    request_id String COMMENT 'Empty where it could not be read',
    producer_id String COMMENT 'Who sent it',
    producer_sequence UInt64 COMMENT 'Its number of this event; 0: does not number',
    reason LowCardinality(String) COMMENT 'conflict, invalid, too_old, too_far_in_future; undecodable: the whole message',
    detail String COMMENT 'Field, value, mend',
    would_have_cost Decimal(38, 12) COMMENT 'Of a conflict: never charged',
    payload String COMMENT 'The event or message as it came, or its first 64 KiB' CODEC(ZSTD(3)),
    payload_bytes UInt64 COMMENT 'How long it was',
    topic LowCardinality(String) COMMENT 'Where it came from',
    offset Int64 COMMENT 'Where it came from',
    rejected DateTime64(3, 'UTC') COMMENT 'Log time',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (ledger_partition, generation, sequence, record_index)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'What was not charged because it could not or must not be. Duplicates are counted in accounts, not kept here';

CREATE TABLE IF NOT EXISTS price_books
(
    currency LowCardinality(String) COMMENT 'Of the prices',
    book_version UInt32 COMMENT '1, 2, 3, ...',
    model String COMMENT 'A name, or a prefix that ends in *',
    operation LowCardinality(String) COMMENT 'unspecified: any',
    service_class LowCardinality(String) COMMENT 'unspecified: any',
    effective DateTime64(3, 'UTC') COMMENT 'Rates usage that ended at or after this, until the next version takes over',
    uncached_input_price Decimal(38, 12) COMMENT 'Of one token, like the others here',
    output_price Decimal(38, 12),
    cache_read_price Decimal(38, 12),
    cache_write_price Decimal(38, 12),
    reasoning_price Decimal(38, 12),
    image_input_price Decimal(38, 12),
    audio_input_price Decimal(38, 12),
    audio_output_price Decimal(38, 12),
    unit_names Array(String) COMMENT 'Named units that have a price',
    unit_prices_pico Array(UInt64) COMMENT 'Beside unit_names, in 10^-12 of the currency',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (currency, book_version, model, operation, service_class)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Every version of the price book that took effect';

CREATE TABLE IF NOT EXISTS commands
(
    ledger_partition UInt32 COMMENT 'The ledger record of the command',
    generation LowCardinality(String) COMMENT 'The ledger record of the command',
    sequence UInt64 COMMENT 'The ledger record of the command',
    command_id String COMMENT 'The same ID is applied once per partition',
    action LowCardinality(String) COMMENT 'credit_grant, price_book, tenant_upsert, key_upsert',
    tenant_id String COMMENT 'Empty for a command that concerns everyone',
    issuer String COMMENT 'Who asked',
    reason String COMMENT 'Why',
    issued DateTime64(3, 'UTC') COMMENT 'When it was asked for',
    applied UInt8 COMMENT '0: seen before, or refused; nothing changed',
    refusal String COMMENT 'Why not applied',
    amount Decimal(38, 12) COMMENT 'Of a credit grant',
    currency LowCardinality(String) COMMENT 'Of amount',
    log_time DateTime64(3, 'UTC') COMMENT 'When it was applied',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (ledger_partition, generation, sequence)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Every command that reached the ledger, applied or not';

CREATE TABLE IF NOT EXISTS api_keys
(
    key_id String COMMENT 'Names the key; its secret is nowhere here',
    tenant_id String COMMENT 'Whose it is',
    project_id String COMMENT 'What it is for',
    user_id String COMMENT 'Who holds it',
    scopes Array(String) COMMENT 'meter, read, admin, prices',
    created DateTime64(3, 'UTC') COMMENT 'When',
    expires DateTime64(3, 'UTC') COMMENT '1970: does not expire',
    revoked UInt8 COMMENT '1: refused',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY key_id
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'API keys without their secrets';

CREATE TABLE IF NOT EXISTS producer_marks
(
    producer_id String COMMENT 'Who counts',
    ledger_partition UInt32 COMMENT 'It numbers its events per partition',
    covered_sequence UInt64 COMMENT 'Everything up to this number is in the ledger',
    highest_sequence UInt64 COMMENT 'The highest number that it says it gave',
    beyond_first Array(UInt64) COMMENT 'Ranges beyond that are in the ledger too: first numbers',
    beyond_last Array(UInt64) COMMENT 'Beside beyond_first: last numbers',
    seen DateTime64(3, 'UTC') COMMENT 'Log time of its last batch or heartbeat',
    missing_since DateTime64(3, 'UTC') COMMENT 'Since when something is missing; 1970: nothing is',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (producer_id, ledger_partition)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'What the ledger has of each producer''s numbering: a hole is lost usage or a broken meter';

CREATE TABLE IF NOT EXISTS ledger_records
(
    ledger_partition UInt32 COMMENT 'Partition of usage.ledger',
    generation_ordinal UInt32 COMMENT 'See generations',
    sequence UInt64 COMMENT 'Number in the chain' CODEC(DoubleDelta, ZSTD(1)),
    generation LowCardinality(String) COMMENT 'Hexadecimal',
    record_hash String COMMENT 'SHA-256 of record; SELECT SHA256(record) = record_hash' CODEC(NONE),
    previous_hash String COMMENT 'record_hash of the record before; empty in a founding record' CODEC(NONE),
    source LowCardinality(String) COMMENT 'founding, usage, command, tick, rejected',
    log_time DateTime64(3, 'UTC') COMMENT 'Log time' CODEC(DoubleDelta, ZSTD(1)),
    ledger_offset Int64 COMMENT 'Where it stood in Kafka; -1: it was handed over' CODEC(DoubleDelta, ZSTD(1)),
    record String COMMENT 'The stored bytes: a sealed billing.v1.LedgerRecord. Holds keyed hashes of API secrets: grant it to auditors only' CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree
ORDER BY (ledger_partition, generation_ordinal, sequence)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'The ledger itself, byte for byte: the proof outlives the retention of the log';

CREATE TABLE IF NOT EXISTS generations
(
    ledger_partition UInt32 COMMENT 'Partition of usage.ledger',
    generation_ordinal UInt32 COMMENT '1 for the first; the upper part of every version',
    generation String COMMENT 'Hexadecimal',
    founded DateTime64(3, 'UTC') COMMENT 'When its founding record was written',
    partitions UInt32 COMMENT 'How many partitions the ledger has',
    predecessor String COMMENT 'The generation that it carries on; empty: none',
    predecessor_sequence UInt64 COMMENT 'Where that one ended',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (ledger_partition, generation_ordinal)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Each time the log was founded, in order';

CREATE TABLE IF NOT EXISTS sink_positions
(
    ledger_partition UInt32 COMMENT 'Partition of usage.ledger',
    generation String COMMENT 'Hexadecimal',
    generation_ordinal UInt32 COMMENT 'See generations',
    sequence UInt64 COMMENT 'Everything up to and including this record is in every table',
    record_hash String COMMENT 'Of that record, hexadecimal: the next one names it',
    ledger_offset Int64 COMMENT 'Where that record stood in Kafka; -1: it was handed over',
    log_time DateTime64(3, 'UTC') COMMENT 'Log time of that record',
    written DateTime64(3, 'UTC') COMMENT 'The sink''s clock when this row was written',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY ledger_partition
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'How far this database is; the row of a batch is written after everything else of it';
