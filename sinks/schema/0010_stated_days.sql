-- Of each tenant's day, how late something was stated of it: so whoever reads sums by day finds in a few rows which to trust.
-- And the sums again, in small granules: a tenant's month is some hundred rows of them. The sink fills them at its next round.
CREATE TABLE IF NOT EXISTS usage_days_stated
(
    tenant_id LowCardinality(String) COMMENT 'Who pays',
    day DateTime('UTC') COMMENT 'Its beginning: a day, UTC, of which usage_totals has minutes',
    ledger_partition UInt32 COMMENT 'Where these minutes are kept',
    version UInt64 COMMENT 'None of them was stated later; the highest version of a key is the row' CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, day, ledger_partition)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600, index_granularity = 512
COMMENT 'When something was last stated of a tenant''s day, written before the minutes themselves';

INSERT INTO usage_days_stated SELECT tenant_id, toStartOfDay(minute), ledger_partition, max(version) FROM usage_totals
GROUP BY tenant_id, toStartOfDay(minute), ledger_partition;

TRUNCATE TABLE usage_days_summed;

DROP TABLE IF EXISTS usage_days;

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
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600, index_granularity = 512
COMMENT 'Sums of usage_totals by day, made now and then. Alone it is not to be relied on: see usage_days_summed, or read tenant_usage_daily';
