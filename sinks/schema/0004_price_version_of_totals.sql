-- A window of totals holds usage rated by one version of the price book: invoices state quantity times price.

ALTER TABLE usage_totals
    ADD COLUMN IF NOT EXISTS price_version UInt32 COMMENT 'The price book version that rates it; 0: no price' AFTER opened_sequence,
    MODIFY ORDER BY (tenant_id, minute, project_id, model, operation, service_class, ledger_partition, generation, opened_sequence, price_version);
