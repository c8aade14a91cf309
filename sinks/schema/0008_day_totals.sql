-- A month of a busy tenant is hundreds of thousands of minutes; by day it is hundreds of rows. Every statement may run twice.

-- Which minutes were stated since a position of the ledger, without reading those that were not.
ALTER TABLE usage_totals ADD INDEX IF NOT EXISTS stated (ledger_partition, version) TYPE minmax GRANULARITY 1;

CREATE TABLE IF NOT EXISTS usage_days
(
    tenant_id LowCardinality(String) COMMENT 'Who pays',
    day DateTime('UTC') COMMENT 'Its beginning: the day, UTC, in which the usage ended',
    project_id LowCardinality(String) COMMENT 'As in usage_totals',
    model LowCardinality(String) COMMENT 'As in usage_totals',
    operation LowCardinality(String) COMMENT 'As in usage_totals',
    service_class LowCardinality(String) COMMENT 'As in usage_totals',
    currency LowCardinality(String) COMMENT 'Of cost',
    ledger_partition UInt32 COMMENT 'Where the minutes are kept',
    counts Array(UInt64) COMMENT 'events, refused_events, unrated_events and the eight classes of tokens, as usage_totals has them: one column is read quicker' CODEC(ZSTD(1)),
    unit_names Array(LowCardinality(String)) COMMENT 'What is not text',
    unit_quantities Array(UInt64) COMMENT 'Beside unit_names',
    cost Decimal(38, 12) COMMENT 'Absolute, exact' CODEC(ZSTD(1)),
    version UInt64 COMMENT 'At least the minutes stated up to here are in it; the highest version of a key is the row' CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, day, project_id, model, operation, service_class, currency, ledger_partition)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Sums of usage_totals by day, made now and then. Alone it is not to be relied on: see usage_days_summed, or read tenant_usage_daily';

CREATE TABLE IF NOT EXISTS usage_days_summed
(
    ledger_partition UInt32 COMMENT 'Whose tenants it speaks of',
    before_day DateTime('UTC') COMMENT 'Days before it are in usage_days, but for minutes that were stated later than version',
    version UInt64 COMMENT 'Order of ledger positions: the highest version of a partition is the row'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY ledger_partition
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'How far usage_days is to be relied on';
