-- hpo's tables as its schema version 1 made them on SQLite; on PostgreSQL FLOAT was FLOAT(53), and
-- the two numbered keys SERIAL and BIGSERIAL.
CREATE TABLE hpo_schema (
    version INTEGER NOT NULL,
    PRIMARY KEY (version)
);
CREATE TABLE hpo_studies (
    uuid VARCHAR(32) NOT NULL,
    study_id INTEGER NOT NULL,
    name VARCHAR(64) NOT NULL,
    definition TEXT NOT NULL,
    source TEXT NOT NULL,
    created FLOAT NOT NULL,
    trials INTEGER NOT NULL,
    timeout_s FLOAT,
    target FLOAT,
    patience_trials INTEGER,
    lease_s FLOAT NOT NULL,
    stop VARCHAR(8),
    stop_reason TEXT,
    resumed FLOAT NOT NULL,
    filler VARCHAR(32),
    filler_until FLOAT,
    PRIMARY KEY (uuid),
    UNIQUE (study_id),
    FOREIGN KEY(study_id) REFERENCES studies (study_id) ON DELETE CASCADE,
    UNIQUE (name)
);
CREATE TABLE hpo_attempts (
    trial_id INTEGER NOT NULL,
    k INTEGER NOT NULL,
    study VARCHAR(32) NOT NULL,
    number INTEGER NOT NULL,
    token VARCHAR(32) NOT NULL,
    worker VARCHAR(64) NOT NULL,
    started FLOAT NOT NULL,
    until FLOAT NOT NULL,
    ended FLOAT,
    outcome VARCHAR(16),
    reason TEXT,
    value FLOAT,
    objectives TEXT,
    first_epoch INTEGER,
    epoch INTEGER,
    runtime TEXT,
    PRIMARY KEY (trial_id, k),
    FOREIGN KEY(trial_id) REFERENCES trials (trial_id) ON DELETE CASCADE,
    FOREIGN KEY(study) REFERENCES hpo_studies (uuid) ON DELETE CASCADE
);
CREATE INDEX ix_hpo_attempts_study ON hpo_attempts (study, outcome);
CREATE TABLE hpo_epochs (
    trial_id INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    study VARCHAR(32) NOT NULL,
    attempt INTEGER NOT NULL,
    finished FLOAT NOT NULL,
    metrics TEXT NOT NULL,
    checkpoint INTEGER,
    PRIMARY KEY (trial_id, epoch),
    FOREIGN KEY(trial_id) REFERENCES trials (trial_id) ON DELETE CASCADE,
    FOREIGN KEY(study) REFERENCES hpo_studies (uuid) ON DELETE CASCADE
);
CREATE INDEX ix_hpo_epochs_study ON hpo_epochs (study);
CREATE TABLE hpo_enqueued (
    id INTEGER NOT NULL,
    study VARCHAR(32) NOT NULL,
    params TEXT NOT NULL,
    number INTEGER,
    PRIMARY KEY (id),
    FOREIGN KEY(study) REFERENCES hpo_studies (uuid) ON DELETE CASCADE
);
CREATE INDEX ix_hpo_enqueued_study ON hpo_enqueued (study);
CREATE TABLE hpo_resolved (
    study VARCHAR(32) NOT NULL,
    "key" VARCHAR(255) NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (study, "key"),
    FOREIGN KEY(study) REFERENCES hpo_studies (uuid) ON DELETE CASCADE
);
CREATE TABLE hpo_workers (
    id VARCHAR(64) NOT NULL,
    study VARCHAR(32) NOT NULL,
    host VARCHAR(255) NOT NULL,
    pid INTEGER NOT NULL,
    device VARCHAR(64) NOT NULL,
    versions TEXT NOT NULL,
    started FLOAT NOT NULL,
    seen FLOAT NOT NULL,
    ended FLOAT,
    reason TEXT,
    number INTEGER,
    epoch INTEGER,
    epochs INTEGER,
    value FLOAT,
    images_per_s FLOAT,
    PRIMARY KEY (id),
    FOREIGN KEY(study) REFERENCES hpo_studies (uuid) ON DELETE CASCADE
);
CREATE INDEX ix_hpo_workers_study ON hpo_workers (study);
