CREATE TABLE models (
    version integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    path text NOT NULL,  -- a folder, absolute, or a hub id
    base text NOT NULL,  -- what its training started from
    made timestamptz NOT NULL DEFAULT now(),
    report jsonb NOT NULL  -- what it was trained on and how it did on held-out pairs and references
);

-- The last one that was not undone is served; none: the extractive summariser.
CREATE TABLE activations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    model integer REFERENCES models,  -- NULL: the extractive summariser
    made timestamptz NOT NULL DEFAULT now(),
    undone timestamptz
);
