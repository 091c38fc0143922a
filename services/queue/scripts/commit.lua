-- Store one view's scores, first writer wins; the last view in sends the group to the trainer.
-- ARGV: namespace, consumer group, entry id, consumer, group id, run, view, scores.
-- Returns 1 when the stored scores are this consumer's (also when a lost reply made it ask twice).
local id, consumer, group_id, run, view, scores = unpack(ARGV, 3, 8)
local group = NAMESPACE .. ':group:' .. group_id
retire(id)
if redis.call('HGET', group, 'status') == 'queued'
    and redis.call('HSETNX', group, 'scores:' .. view, scores) == 1 then
  redis.call('HSET', group, 'scorer:' .. view, consumer)
  redis.call('HINCRBY', LOAD, 'scored', 1)
  if redis.call('HINCRBY', group, 'pending', -1) == 0 then
    redis.call('HSET', group, 'status', 'scored')
    push_scored(run, group_id, 'scored')
  end
  return 1
end
return redis.call('HGET', group, 'scorer:' .. view) == consumer and 1 or 0
