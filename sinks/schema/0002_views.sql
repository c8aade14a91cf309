-- For people: right without knowing how the tables replace rows. Every statement may run twice.

CREATE VIEW IF NOT EXISTS tenant_balances AS
SELECT
    tenant_id,
    display_name,
    status,
    currency,
    credit,
    spend,
    credit - spend AS balance,
    events,
    duplicates,
    conflicts,
    unrated_events,
    plan_id,
    billing_mode,
    log_time AS as_of
FROM accounts FINAL
COMMENT 'What each tenant was granted, spent, and has left';

CREATE VIEW IF NOT EXISTS tenant_usage_minutes AS
SELECT
    tenant_id,
    minute,
    project_id,
    model,
    operation,
    service_class,
    currency,
    sum(events) AS events,
    sum(refused_events) AS refused_events,
    sum(unrated_events) AS unrated_events,
    sum(uncached_input_tokens) AS uncached_input_tokens,
    sum(cache_read_tokens) AS cache_read_tokens,
    sum(cache_write_tokens) AS cache_write_tokens,
    sum(output_tokens) AS output_tokens,
    sum(reasoning_tokens) AS reasoning_tokens,
    sum(image_input_tokens) AS image_input_tokens,
    sum(audio_input_tokens) AS audio_input_tokens,
    sum(audio_output_tokens) AS audio_output_tokens,
    CAST(sumMap(unit_names, unit_quantities), 'Map(String, UInt64)') AS units,
    sum(cost) AS cost
FROM usage_totals FINAL
GROUP BY tenant_id, minute, project_id, model, operation, service_class, currency
COMMENT 'Usage and cost by minute of event time';

CREATE VIEW IF NOT EXISTS tenant_usage_daily AS
SELECT
    tenant_id,
    toDate(minute, 'UTC') AS day,
    project_id,
    model,
    operation,
    service_class,
    currency,
    sum(events) AS events,
    sum(refused_events) AS refused_events,
    sum(unrated_events) AS unrated_events,
    sum(uncached_input_tokens) AS uncached_input_tokens,
    sum(cache_read_tokens) AS cache_read_tokens,
    sum(cache_write_tokens) AS cache_write_tokens,
    sum(output_tokens) AS output_tokens,
    sum(reasoning_tokens) AS reasoning_tokens,
    sum(image_input_tokens) AS image_input_tokens,
    sum(audio_input_tokens) AS audio_input_tokens,
    sum(audio_output_tokens) AS audio_output_tokens,
    CAST(sumMap(unit_names, unit_quantities), 'Map(String, UInt64)') AS units,
    sum(cost) AS cost
FROM usage_totals FINAL
GROUP BY tenant_id, day, project_id, model, operation, service_class, currency
COMMENT 'Usage and cost by day (UTC) of event time';

CREATE VIEW IF NOT EXISTS usage_events_current AS
SELECT * FROM usage_events FINAL
COMMENT 'Every accepted event exactly once. Ask by tenant_id: the table is sorted by it';

CREATE VIEW IF NOT EXISTS alerts_recent AS
SELECT
    raised,
    severity,
    rule,
    tenant_id,
    summary,
    request_ids,
    CAST((figure_names, figure_values), 'Map(String, Int64)') AS figures,
    CAST((label_names, label_values), 'Map(String, String)') AS labels,
    alert_id
FROM alerts FINAL
WHERE raised >= now() - INTERVAL 30 DAY
ORDER BY raised DESC
COMMENT 'Alerts of the last 30 days, newest first';

CREATE VIEW IF NOT EXISTS rejected_recent AS
SELECT rejected, reason, detail, tenant_id, request_id, would_have_cost, payload_bytes, topic, offset, record_index
FROM rejected FINAL
WHERE rejected >= now() - INTERVAL 30 DAY
ORDER BY rejected DESC
COMMENT 'What was not charged in the last 30 days, newest first';

CREATE VIEW IF NOT EXISTS producers_incomplete AS
SELECT producer_id, ledger_partition, covered_sequence, highest_sequence, missing_since, seen
FROM producer_marks FINAL
WHERE covered_sequence < highest_sequence
COMMENT 'Producers whose numbering has a hole: usage that was counted and is not in the ledger';

CREATE VIEW IF NOT EXISTS ledger_freshness AS
SELECT ledger_partition, generation, sequence, log_time, written
FROM sink_positions FINAL
COMMENT 'How far this database is in each partition of the ledger';
