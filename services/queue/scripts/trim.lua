-- Trim one stream below the oldest entry that anyone still needs. Returns entries trimmed.
return trim(STREAM)
