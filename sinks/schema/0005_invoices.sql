-- What periods came to, line by line, and the invoices that were drawn from it. Every statement may run twice.

CREATE TABLE IF NOT EXISTS period_lines
(
    tenant_id LowCardinality(String) COMMENT 'Who pays',
    period_start DateTime64(3, 'UTC') COMMENT 'The period of the tenant''s calendar in which the usage ended',
    period_end DateTime64(3, 'UTC') COMMENT 'The period ends before it',
    currency LowCardinality(String) COMMENT 'Of amount',
    project_id LowCardinality(String) COMMENT 'The tenant''s project; (other): more than are told apart',
    model LowCardinality(String) COMMENT 'What was run; (other): more than are told apart; of what the close adds: as the price book names it',
    operation LowCardinality(String) COMMENT 'generate, chat, embeddings, ...',
    service_class LowCardinality(String) COMMENT 'standard, priority, batch',
    price_version UInt32 COMMENT 'The price book version that rates it; 0: no price, or no book says so',
    adjustment_id String COMMENT 'The command that says so; empty: usage',
    line_id String COMMENT 'Names the line: SHA-256 of its key, hexadecimal; what comes after an invoice opens another line',
    quantity_of String COMMENT 'A class of tokens, a named unit, minimum, commitment; empty: the row that counts the line''s events',
    terms String COMMENT 'free, tier 2, context over 200,000 tokens, at the close; empty: a flat price',
    unit_price Decimal(38, 12) COMMENT 'Of one unit; 0 beside an amount: it has no price a unit',
    units Decimal(38, 12) COMMENT 'How many, whole' CODEC(ZSTD(1)),
    amount Decimal(38, 12) COMMENT 'Exact; absolute' CODEC(ZSTD(1)),
    events UInt64 COMMENT 'Accepted events, on the row that counts' CODEC(ZSTD(1)),
    refused_events UInt64 COMMENT 'Of those, at price 0: refused, or nothing was delivered' CODEC(ZSTD(1)),
    unrated_events UInt64 COMMENT 'Of those, without a price' CODEC(ZSTD(1)),
    ledger_partition UInt32 COMMENT 'Where the line is kept',
    version UInt64 COMMENT 'Order of ledger positions: the highest version of a key is the row' CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, period_start, line_id, quantity_of, terms, unit_price)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'What windows that were let go and adjustments came to, by period; with the open windows it is the spend. Read it through uninvoiced_lines';

CREATE TABLE IF NOT EXISTS invoiced_lines
(
    tenant_id LowCardinality(String) COMMENT 'Who pays',
    line_id String COMMENT 'Of period_lines',
    series LowCardinality(String) COMMENT 'The invoice that took it',
    number UInt64 COMMENT 'The invoice that took it',
    ledger_partition UInt32 COMMENT 'The ledger record that says so',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, line_id)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Which invoice took which line';

CREATE TABLE IF NOT EXISTS invoices
(
    tenant_id LowCardinality(String) COMMENT 'Who pays',
    series LowCardinality(String) COMMENT 'One for each ledger partition and prefix',
    number UInt64 COMMENT '1, 2, 3, ... in the series, without gaps',
    period_start DateTime64(3, 'UTC') COMMENT 'The period that it is of',
    period_end DateTime64(3, 'UTC') COMMENT 'The period ends before it',
    time_zone LowCardinality(String) COMMENT 'Of the period',
    issued DateTime64(3, 'UTC') COMMENT 'Log time of the record that drew it',
    currency LowCardinality(String) COMMENT 'Of all amounts here',
    events UInt64 COMMENT 'Accepted events on it',
    unrated_events UInt64 COMMENT 'Of those, without a price: invoiced when they get one',
    usage Decimal(38, 12) COMMENT 'Of its period, exact',
    adjustments Decimal(38, 12) COMMENT 'Of earlier periods and by corrections, exact',
    net_exact Decimal(38, 12) COMMENT 'Both; the exact sums of all invoices and of uninvoiced_lines and the open windows are what was charged',
    net Decimal(38, 12) COMMENT 'net_exact, rounded to the currency''s smallest unit',
    tax Decimal(38, 12) COMMENT 'All taxes',
    total Decimal(38, 12) COMMENT 'net and tax',
    credits Decimal(38, 12) COMMENT 'Credit that paid for it, exact',
    due Decimal(38, 12) COMMENT 'What is left to pay',
    invoice_hash String COMMENT 'SHA-256 of invoice, hexadecimal',
    previous_hash String COMMENT 'invoice_hash of the one before in the series, hexadecimal; empty for the first',
    invoice String COMMENT 'The stored bytes: a billing.v1.Invoice' CODEC(ZSTD(3)),
    ledger_partition UInt32 COMMENT 'The ledger record that drew it',
    generation LowCardinality(String) COMMENT 'The ledger record that drew it',
    sequence UInt64 COMMENT 'The ledger record that drew it',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, series, number)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Final invoices. Drafts are in the ledger records alone. Read it through tenant_invoices';

CREATE TABLE IF NOT EXISTS invoice_lines
(
    tenant_id LowCardinality(String) COMMENT 'Who pays',
    series LowCardinality(String) COMMENT 'The invoice',
    number UInt64 COMMENT 'The invoice',
    line_number UInt32 COMMENT '1, 2, 3, ... on the invoice',
    adjustment UInt8 COMMENT '1: of an earlier period, or a correction',
    period_start DateTime64(3, 'UTC') COMMENT 'Of the line',
    period_end DateTime64(3, 'UTC') COMMENT 'Of the line',
    currency LowCardinality(String) COMMENT 'Of amount',
    project_id LowCardinality(String) COMMENT 'As in period_lines',
    model LowCardinality(String) COMMENT 'As in period_lines',
    operation LowCardinality(String) COMMENT 'As in period_lines',
    service_class LowCardinality(String) COMMENT 'As in period_lines',
    price_version UInt32 COMMENT 'As in period_lines',
    adjustment_id String COMMENT 'As in period_lines',
    quantity_of String COMMENT 'A class of tokens, a named unit, minimum, commitment',
    terms String COMMENT 'As in period_lines',
    unit_price Decimal(38, 12) COMMENT 'Of one unit; 0 beside an amount: it has no price a unit',
    units Decimal(38, 12) COMMENT 'How many, whole',
    amount Decimal(38, 12) COMMENT 'Exact',
    ledger_partition UInt32 COMMENT 'The ledger record that drew it',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, series, number, line_number)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Lines of final invoices';

CREATE VIEW IF NOT EXISTS tenant_invoices AS
SELECT
    tenant_id, series, number, period_start, period_end, time_zone, issued, currency, usage, adjustments, net, tax, total,
    credits, due, invoice_hash
FROM invoices FINAL
COMMENT 'Final invoices, without their bytes';

CREATE VIEW IF NOT EXISTS uninvoiced_lines AS
SELECT
    tenant_id, period_start, period_end, currency, project_id, model, operation, service_class, price_version, adjustment_id,
    quantity_of, terms, unit_price, units, amount, events, refused_events, unrated_events, line_id
FROM period_lines FINAL
WHERE (tenant_id, line_id) NOT IN (SELECT tenant_id, line_id FROM invoiced_lines)
COMMENT 'What no invoice has taken, but for the windows of the last minutes';
