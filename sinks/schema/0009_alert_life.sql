-- An alert is one row for all of its life: raised, updated, acknowledged, resolved.

ALTER TABLE alerts
    ADD COLUMN IF NOT EXISTS subject String COMMENT 'What it is about beside the tenant: a model, a key',
    ADD COLUMN IF NOT EXISTS state LowCardinality(String) DEFAULT 'raised' COMMENT 'raised, updated, acknowledged, resolved',
    ADD COLUMN IF NOT EXISTS revision UInt32 DEFAULT 1 COMMENT 'Counts what was told of it',
    ADD COLUMN IF NOT EXISTS updated DateTime64(3, 'UTC') DEFAULT raised COMMENT 'Log time of what was told last',
    ADD COLUMN IF NOT EXISTS acknowledged_by String COMMENT 'Who has taken it on; empty: nobody',
    ADD COLUMN IF NOT EXISTS note String COMMENT 'What was said then',
    ADD COLUMN IF NOT EXISTS action String COMMENT 'What gateways do because of it; empty: it only tells';

CREATE OR REPLACE VIEW alerts_recent AS
SELECT
    raised,
    severity,
    rule,
    tenant_id,
    summary,
    request_ids,
    CAST((figure_names, figure_values), 'Map(String, Int64)') AS figures,
    CAST((label_names, label_values), 'Map(String, String)') AS labels,
    alert_id,
    subject,
    state,
    updated,
    acknowledged_by,
    note,
    action
FROM alerts FINAL
WHERE raised >= now() - INTERVAL 30 DAY
ORDER BY raised DESC
COMMENT 'Alerts of the last 30 days, newest first, each as it is now';
