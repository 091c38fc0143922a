-- Trim one stream below the oldest entry that anyone still needs. Returns entries trimmed.
if redis.call('EXISTS', STREAM) == 0 then return 0 end
return trim(STREAM)
