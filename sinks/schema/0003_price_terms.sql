-- Price books with every term that they can have. Every statement may run twice.

-- A line of a tenant's own stands beside that of everyone.
ALTER TABLE price_books
    ADD COLUMN IF NOT EXISTS tenant_id String COMMENT 'Of this tenant alone; empty: of everyone',
    ADD COLUMN IF NOT EXISTS line UInt32 COMMENT 'Its place in the book, from 1',
    ADD COLUMN IF NOT EXISTS minimum_price Decimal(38, 12) COMMENT 'What one request costs at least',
    ADD COLUMN IF NOT EXISTS tier_quantities Array(String) COMMENT 'Where a price depends on how much the period has seen: of which quantity, one entry a tier',
    ADD COLUMN IF NOT EXISTS tier_modes Array(String) COMMENT 'Beside tier_quantities: graduated, volume, package',
    ADD COLUMN IF NOT EXISTS tier_free_units Array(UInt64) COMMENT 'Beside tier_quantities: units of the quantity that are free, before the first tier',
    ADD COLUMN IF NOT EXISTS tier_up_to_units Array(UInt64) COMMENT 'Beside tier_quantities: the last unit of the tier, behind the free ones; 0: no end',
    ADD COLUMN IF NOT EXISTS tier_prices_pico Array(UInt64) COMMENT 'Beside tier_quantities: of a unit (of a package: of all of it), in 10^-12 of the currency',
    ADD COLUMN IF NOT EXISTS tier_package_units Array(UInt64) COMMENT 'Beside tier_quantities: how many units are sold at once; 0: no package',
    ADD COLUMN IF NOT EXISTS context_above_tokens Array(UInt64) COMMENT 'Other prices for requests with more context than this, one entry a price',
    ADD COLUMN IF NOT EXISTS context_quantities Array(String) COMMENT 'Beside context_above_tokens: of which quantity',
    ADD COLUMN IF NOT EXISTS context_prices_pico Array(UInt64) COMMENT 'Beside context_above_tokens, of a unit, in 10^-12 of the currency',
    ADD COLUMN IF NOT EXISTS factor_classes Array(String) COMMENT 'Service classes that pay another part of all amounts of the line',
    ADD COLUMN IF NOT EXISTS factor_millionths Array(UInt64) COMMENT 'Beside factor_classes: 500000 is half',
    MODIFY ORDER BY (currency, book_version, model, operation, service_class, tenant_id);

CREATE TABLE IF NOT EXISTS price_commitments
(
    currency LowCardinality(String) COMMENT 'Of the amount',
    book_version UInt32 COMMENT 'The version of the price book that says so',
    tenant_id String COMMENT 'Who promised it',
    amount Decimal(38, 12) COMMENT 'At least this much a period; settled at its close',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (currency, book_version, tenant_id)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'What tenants promised to spend';

-- A period's bounds are the tenant's own, and what is rated again needs them.
ALTER TABLE accounts
    ADD COLUMN IF NOT EXISTS time_zone LowCardinality(String) COMMENT 'Of its billing periods; empty: UTC',
    ADD COLUMN IF NOT EXISTS calendar_from_months Array(UInt64) COMMENT 'Months since 1970-01 from which an offset holds',
    ADD COLUMN IF NOT EXISTS calendar_offset_minutes Array(Int64) COMMENT 'Beside calendar_from_months: minutes east of UTC';
