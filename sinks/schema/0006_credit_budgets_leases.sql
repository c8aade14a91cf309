-- Credit by grant as it was at any time; budgets, projects and leases as they are.

CREATE TABLE IF NOT EXISTS credit_grants
(
    tenant_id String COMMENT 'Whose credit it is',
    grant_id String COMMENT 'Its name, unique for the tenant',
    at DateTime64(3, 'UTC') COMMENT 'The moment that the row speaks of; the last millisecond of a month that was closed by it',
    currency LowCardinality(String) COMMENT 'Of all amounts',
    kind LowCardinality(String) COMMENT 'promotional, paid, opening, payment, correction',
    priority UInt32 COMMENT 'Lower ones are used first',
    granted DateTime64(3, 'UTC') COMMENT 'When',
    expires DateTime64(3, 'UTC') COMMENT '1970: does not expire',
    amount Decimal(38, 12) COMMENT 'What was granted: used + expired + left',
    used Decimal(38, 12) COMMENT 'Spend that it paid for',
    expired Decimal(38, 12) COMMENT 'What was left when it expired',
    reference String COMMENT 'For people: the payment, the invoice',
    ledger_partition UInt32 COMMENT 'The ledger record that states it',
    generation LowCardinality(String) COMMENT 'The ledger record that states it',
    sequence UInt64 COMMENT 'The ledger record that states it',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, grant_id, at)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Every state of every grant: what was left at any month''s end';

CREATE TABLE IF NOT EXISTS credit_allocations
(
    tenant_id String COMMENT 'Whose credit it is',
    at DateTime64(3, 'UTC') COMMENT 'The moment that the row speaks of',
    allocated Decimal(38, 12) COMMENT 'Spend up to here is set against grants, or against nobody''s',
    due Decimal(38, 12) COMMENT 'Spend on invoices that no grant has paid',
    uninvoiced Decimal(38, 12) COMMENT 'Spend that no invoice has yet',
    uncovered Decimal(38, 12) COMMENT 'Of that, what no grant has paid',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY tenant_id
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'How far each tenant''s spend is set against its credit';

CREATE TABLE IF NOT EXISTS budgets
(
    tenant_id String COMMENT 'Whose',
    project_id String COMMENT 'Empty: of a user, or of the whole tenant',
    user_id String COMMENT 'Empty: of a project, or of the whole tenant',
    amount Decimal(38, 12) COMMENT 'How much may be spent in a period',
    thresholds_millionths Array(UInt64) COMMENT 'Each warns once a period: 800000 is 80 %',
    hard_stop UInt8 COMMENT '1: gateways refuse what comes when it is used up',
    period_start DateTime64(3, 'UTC') COMMENT 'The period that is counted, in the tenant''s zone a month',
    period_end DateTime64(3, 'UTC') COMMENT 'When the next one begins',
    spend Decimal(38, 12) COMMENT 'What was charged to it in this period',
    warned UInt32 COMMENT 'How many thresholds warned in this period',
    used_up UInt8 COMMENT '1: spend has reached the amount',
    gone UInt8 COMMENT '1: the budget has ended',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, project_id, user_id)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Budgets and what they have seen of their period';

CREATE TABLE IF NOT EXISTS projects
(
    tenant_id String COMMENT 'Whose',
    project_id String COMMENT 'Keys, usage and budgets name it',
    display_name String COMMENT 'For people',
    closed UInt8 COMMENT '1: gateways refuse its keys',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, project_id)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Projects that were created or closed';

CREATE TABLE IF NOT EXISTS leases
(
    tenant_id String COMMENT 'Whose money it is',
    holder_id String COMMENT 'The gateway: the producer ID of its journal',
    epoch UInt64 COMMENT 'Which start of the gateway',
    granted Decimal(38, 12) COMMENT 'In all, since the epoch began',
    charged Decimal(38, 12) COMMENT 'Of it, what the ledger has charged',
    expires DateTime64(3, 'UTC') COMMENT 'From then on it admits nothing',
    ended UInt8 COMMENT '1: of an earlier start; comes back when the ledger has all of its usage',
    gone UInt8 COMMENT '1: nothing of it is left',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, holder_id, epoch)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'What gateways hold of balances';

ALTER TABLE accounts ADD COLUMN IF NOT EXISTS leased Decimal(38, 12) COMMENT 'What gateways hold of the balance';

ALTER TABLE commands ADD COLUMN IF NOT EXISTS outcome String COMMENT 'What there is to say of a command that was applied';
