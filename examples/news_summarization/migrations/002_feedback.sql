-- An answer as it was shown. A choice refers to it, so that a reader can choose only what this server wrote; passages and
-- summaries are copies, since articles change.
CREATE TABLE asks (
    id uuid PRIMARY KEY,
    asked timestamptz NOT NULL DEFAULT now(),
    query text NOT NULL,
    prompt text NOT NULL,  -- what a model was given, or would have been
    passages jsonb NOT NULL,
    summaries jsonb NOT NULL  -- one or two: {"text", "sentences": [{"text", "citations"}], "model"}, in the order shown
);

CREATE TABLE choices (
    ask uuid PRIMARY KEY REFERENCES asks,
    chosen smallint NOT NULL CHECK (chosen IN (0, 1)),
    made timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE ratings (
    ask uuid NOT NULL REFERENCES asks,
    summary smallint NOT NULL CHECK (summary IN (0, 1)),
    rating smallint NOT NULL CHECK (rating IN (-1, 1)),
    made timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (ask, summary)
);
