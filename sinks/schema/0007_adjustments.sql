-- Corrections: new entries beside the usage that they correct, which stays. Every statement may run twice.

CREATE TABLE IF NOT EXISTS adjustments
(
    tenant_id String COMMENT 'Whose',
    adjustment_id String COMMENT 'The command that says so',
    line UInt32 COMMENT 'Its place in the adjustment, from 1',
    part UInt32 COMMENT 'Its place in the line, from 1',
    kind LowCardinality(String) COMMENT 'void, amend, credit_note, rerate, rate_unrated',
    period_start DateTime64(3, 'UTC') COMMENT 'The billing period that it corrects',
    period_end DateTime64(3, 'UTC') COMMENT 'Where that ends',
    project_id String COMMENT 'Whose usage it corrects; empty: of none',
    model String COMMENT 'What usage it corrects; empty: of none',
    operation LowCardinality(String) COMMENT 'What usage it corrects',
    service_class LowCardinality(String) COMMENT 'What usage it corrects',
    price_version UInt32 COMMENT 'The price book version of unit_price; 0: of none',
    quantity_of String COMMENT 'A class of tokens, a named unit, minimum, credit note',
    terms String COMMENT 'For people: tier 2, context over 200,000 tokens',
    units Decimal(38, 12) COMMENT 'Whole units; below zero: taken back',
    unit_price Decimal(38, 12) COMMENT 'Of one unit; 0 beside an amount that has no price a unit',
    amount Decimal(38, 12) COMMENT 'What it adds to the spend; below zero: given back',
    currency LowCardinality(String) COMMENT 'Of the amounts',
    invoice String COMMENT 'The invoice that it is about, as whoever asked named it',
    issuer String COMMENT 'Who asked',
    reason String COMMENT 'Why',
    log_time DateTime64(3, 'UTC') COMMENT 'When it was applied',
    ledger_partition UInt32 COMMENT 'The ledger record of the command',
    generation LowCardinality(String) COMMENT 'The ledger record of the command',
    sequence UInt64 COMMENT 'The ledger record of the command',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, adjustment_id, line, part)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'What was corrected: units at one price, one row each. Usage tables show usage as it was metered; the spend in accounts has both';

CREATE TABLE IF NOT EXISTS corrected_events
(
    tenant_id String COMMENT 'Whose',
    request_id String COMMENT 'The event that was voided or amended',
    adjustment_id String COMMENT 'By which adjustment',
    kind LowCardinality(String) COMMENT 'void, amend',
    log_time DateTime64(3, 'UTC') COMMENT 'When',
    ledger_partition UInt32 COMMENT 'The ledger record that says so',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, request_id)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Events that were corrected, each once: the ledger forgets them after 400 days, this does not';

CREATE VIEW IF NOT EXISTS tenant_adjustments AS
SELECT tenant_id, period_start, kind, adjustment_id, issuer, reason, currency, project_id, model, quantity_of, terms,
    sum(units) AS units, sum(amount) AS amount, max(log_time) AS log_time
FROM adjustments FINAL
GROUP BY tenant_id, period_start, kind, adjustment_id, issuer, reason, currency, project_id, model, quantity_of, terms
COMMENT 'Corrections of each tenant by the period that they are about: cost by usage plus these is what was charged';
