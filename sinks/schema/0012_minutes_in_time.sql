-- The minutes of all tenants once more, in the order of time: what everybody used in the last ten minutes is then a few thousand
-- rows that lie together, and not some in each tenant's part of usage_totals. Every statement may run twice.

CREATE TABLE IF NOT EXISTS usage_by_minute
(
    minute DateTime('UTC') COMMENT 'As in usage_totals, like everything here' CODEC(DoubleDelta, ZSTD(1)),
    tenant_id LowCardinality(String) COMMENT 'Who pays',
    project_id LowCardinality(String) COMMENT 'The tenant''s project',
    model LowCardinality(String) COMMENT 'What was run',
    operation LowCardinality(String) COMMENT 'generate, chat, embeddings, ...',
    service_class LowCardinality(String) COMMENT 'standard, priority, batch',
    ledger_partition UInt32 COMMENT 'Where the window is kept',
    generation LowCardinality(String) COMMENT 'The ledger generation in which the window was opened and kept',
    opened_sequence UInt64 COMMENT 'The ledger record that opened it' CODEC(ZSTD(1)),
    price_version UInt32 COMMENT 'The price book version that rates it; 0: no price',
    events UInt64 COMMENT 'Accepted events' CODEC(ZSTD(1)),
    refused_events UInt64 COMMENT 'Of those, at price 0 and in no quantity here' CODEC(ZSTD(1)),
    unrated_events UInt64 COMMENT 'Of those, without a price' CODEC(ZSTD(1)),
    input_tokens_all UInt64 COMMENT 'The sum of the five classes of input' CODEC(ZSTD(1)),
    output_tokens_all UInt64 COMMENT 'The sum of the three classes of output' CODEC(ZSTD(1)),
    gpu_ms UInt64 COMMENT 'The unit of that name; 0 where there is none' CODEC(ZSTD(1)),
    cost Decimal(38, 12) COMMENT 'Absolute, exact' CODEC(ZSTD(1)),
    currency LowCardinality(String) COMMENT 'Of cost',
    version UInt64 COMMENT 'Order of ledger positions: the highest version of a key is the row' CODEC(ZSTD(1)),
    INDEX stated (ledger_partition, version) TYPE minmax GRANULARITY 1
)
ENGINE = ReplacingMergeTree(version)
PARTITION BY toYear(minute)
ORDER BY (minute, tenant_id, project_id, model, operation, service_class, ledger_partition, generation, opened_sequence, price_version)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'The minutes of usage_totals in the order of time, for what concerns all tenants. The database itself copies them';

-- Copied, nothing is summed over rows: a row that replaces another replaces it here, too. The database copies, so that a sink of the
-- version before does as well; an insert succeeds when both tables have the rows, and is repeated else.
CREATE MATERIALIZED VIEW IF NOT EXISTS usage_by_minute_copied TO usage_by_minute AS
SELECT
    minute,
    tenant_id,
    project_id,
    model,
    operation,
    service_class,
    ledger_partition,
    generation,
    opened_sequence,
    price_version,
    events,
    refused_events,
    unrated_events,
    uncached_input_tokens + cache_read_tokens + cache_write_tokens + image_input_tokens + audio_input_tokens AS input_tokens_all,
    output_tokens + reasoning_tokens + audio_output_tokens AS output_tokens_all,
    unit_quantities[indexOf(unit_names, 'gpu_ms')] AS gpu_ms,
    cost,
    currency,
    version
FROM usage_totals
COMMENT 'Copies what is written to usage_totals to usage_by_minute';

INSERT INTO usage_by_minute
SELECT
    minute,
    tenant_id,
    project_id,
    model,
    operation,
    service_class,
    ledger_partition,
    generation,
    opened_sequence,
    price_version,
    events,
    refused_events,
    unrated_events,
    uncached_input_tokens + cache_read_tokens + cache_write_tokens + image_input_tokens + audio_input_tokens,
    output_tokens + reasoning_tokens + audio_output_tokens,
    unit_quantities[indexOf(unit_names, 'gpu_ms')],
    cost,
    currency,
    version
FROM usage_totals;

-- Whether anything was stated since a position of the ledger, without reading what was not; of rows that are written from now on.
ALTER TABLE usage_days ADD INDEX IF NOT EXISTS stated (ledger_partition, version) TYPE minmax GRANULARITY 1;

ALTER TABLE usage_days_stated ADD INDEX IF NOT EXISTS stated (ledger_partition, version) TYPE minmax GRANULARITY 1;
