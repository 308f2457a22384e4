CREATE EXTENSION IF NOT EXISTS vector;

-- What the whole collection has in common: the embedding model and its dimension.
CREATE TABLE settings (name text PRIMARY KEY, value text NOT NULL);

CREATE TABLE articles (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    url text UNIQUE,
    hash bytea NOT NULL UNIQUE,  -- SHA-256 of title and text
    title text NOT NULL,
    text text NOT NULL,
    source text NOT NULL,
    published timestamptz,
    ingested timestamptz NOT NULL DEFAULT now()
);

-- A passage of an article: characters start to stop of its text.
CREATE TABLE chunks (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    article bigint NOT NULL REFERENCES articles ON DELETE CASCADE,
    start integer NOT NULL,
    stop integer NOT NULL,
    published timestamptz,  -- the article's, so that a filter by date needs no join inside the index scan
    words tsvector NOT NULL,
    embedding vector NOT NULL,  -- its dimension, and the HNSW index, come with the first embedding model
    CHECK (0 <= start AND start < stop),
    UNIQUE (article, start)
);
CREATE INDEX chunks_words ON chunks USING gin (words);
CREATE INDEX chunks_published ON chunks (published);

-- In how many chunks a lexeme occurs, and under '', which is no lexeme, how many chunks there are. PostgreSQL's own
-- ranking does not know it, and a question is mostly common words.
CREATE TABLE lexemes (lexeme text PRIMARY KEY, chunks bigint NOT NULL);

CREATE FUNCTION count_lexemes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO lexemes SELECT lexeme, count(*) FROM changed, unnest('{""}' || tsvector_to_array(changed.words)) AS lexeme
        GROUP BY lexeme ORDER BY lexeme
        ON CONFLICT (lexeme) DO UPDATE SET chunks = lexemes.chunks + excluded.chunks;
    ELSE
        UPDATE lexemes SET chunks = lexemes.chunks - gone.chunks
        FROM (SELECT lexeme, count(*) AS chunks FROM changed, unnest('{""}' || tsvector_to_array(changed.words)) AS lexeme
              GROUP BY lexeme) AS gone
        WHERE lexemes.lexeme = gone.lexeme;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chunks_inserted AFTER INSERT ON chunks REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_lexemes();
CREATE TRIGGER chunks_deleted AFTER DELETE ON chunks REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_lexemes();
