-- People who were taken out of what is kept here: who stands for them, and that nothing of what was there before names them.

ALTER TABLE ledger_records ADD COLUMN IF NOT EXISTS redaction String COMMENT 'Empty: record is as it was sealed. Else a person was taken out of it since, record_hash is still that of the whole, and this vouches for both' CODEC(NONE);

CREATE TABLE IF NOT EXISTS erasures
(
    tenant_id String COMMENT 'Whose user it was',
    pseudonym String COMMENT 'What stands in the user''s place, random',
    user_digest String COMMENT 'By which later usage of the same user is known: an HMAC, hexadecimal, of no use without the seal key',
    key_ids Array(String) COMMENT 'API keys that the user held, now the pseudonym''s',
    erased DateTime64(3, 'UTC') COMMENT 'Log time: what is written from then on never names the user',
    ledger_partition UInt32 COMMENT 'The ledger record of the command',
    generation LowCardinality(String) COMMENT 'The ledger record of the command',
    sequence UInt64 COMMENT 'The ledger record of the command',
    version UInt64 COMMENT 'Order of ledger positions'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, pseudonym, generation, sequence)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Users who were erased, and again where that was asked for again; who asked and why stands in commands';

CREATE TABLE IF NOT EXISTS erasures_done
(
    tenant_id String COMMENT 'As in erasures',
    pseudonym String COMMENT 'As in erasures',
    done DateTime64(3, 'UTC') COMMENT 'The sink''s clock when nothing that was written before named the user any more',
    version UInt64 COMMENT 'As in erasures: the erasure that is meant'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (tenant_id, pseudonym)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_bytes_for_full_part_storage = 104857600
COMMENT 'Erasures that are over';
