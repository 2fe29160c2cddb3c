// A data source that asks Prometheus' HTTP API as Grafana's own does: intervals, legends, tables and annotations.
import {
  DataSourceApi, FieldType, rangeUtil, renderLegendFormat, toDataFrame,
} from '@grafana/data';
import { sceneGraph } from '@grafana/scenes';
import { from, of } from 'rxjs';

const SAFE_POINTS = 11000; // Prometheus refuses more
const escape = (text) => String(text).replace(/[\\^$*+?.()|[\]{}]/g, '\\\\$&');

/** A variable's value in a matcher: `=~` takes alternatives, `=` the only one. "All" with an own value comes as it is. */
function asMatcher(value, variable) {
  if (Array.isArray(value)) {
    return value.length > 1 ? `(${value.map(escape).join('|')})` : escape(value[0] ?? '');
  }
  return variable?.multi || variable?.includeAll ? escape(value) : value;
}

const labelled = ({ __name__, ...labels }) =>
  `${__name__ ?? ''}{${Object.entries(labels).map(([name, value]) => `${name}="${value}"`).join(', ')}}`;

const number = (text) => ({ NaN, '+Inf': Infinity, '-Inf': -Infinity })[text] ?? Number(text);

export class Prometheus extends DataSourceApi {
  /** `url`: of Prometheus; `scrape`: how often it scrapes, which no rate may undercut ("15s"). */
  constructor(settings, url, scrape) {
    super(settings);
    this.url = url;
    this.scrape = rangeUtil.intervalToSeconds(scrape);
    this.interval = scrape;
    this.annotations = {
      prepareQuery: (mark) => ({ refId: 'Anno', expr: mark.expr, range: true, interval: mark.step }),
      processEvents: (mark, frames) => of(frames.flatMap((frame) => events(mark, frame))),
    };
  }

  query(request) {
    return from(Promise.all(request.targets.map((target) => this.ask(target, request))).then((found) => ({ data: found.flat() })));
  }

  async ask(target, request) {
    const { from: start, to: end } = request.range;
    const seconds = (end - start) / 1000;
    const least = target.interval ? rangeUtil.intervalToSeconds(target.interval) : this.scrape;
    const step = Math.max(least, request.intervalMs / 1000, Math.ceil(seconds / SAFE_POINTS));
    const window = Math.max(step + this.scrape, 4 * this.scrape);
    const scoped = {
      ...request.scopedVars,
      __rate_interval: { value: `${window}s` },
      __range: { value: `${Math.round(seconds)}s` },
    };
    const query = sceneGraph.interpolate(scoped.__sceneObject.value.valueOf(), target.expr, scoped, asMatcher);
    const data = target.instant
      ? await this.get('query', { query, time: end / 1000 })
      : await this.get('query_range', { query, step, start: Math.floor(start / 1000 / step) * step, end: end / 1000 });
    return target.format === 'table' ? table(target, data.result) : data.result.map((series) => line(target, series, step));
  }

  /** `label_values(selector, label)`, the only kind of variable that the dashboards have. */
  async metricFindQuery(query, request) {
    const [, selector, label] = query.query.match(/^label_values\((.*),\s*(\w+)\)$/s);
    const variable = request.scopedVars.__sceneObject.value.valueOf();
    const found = await this.get(`label/${label}/values`, {
      'match[]': sceneGraph.interpolate(variable, selector, request.scopedVars, asMatcher),
      start: request.range.from / 1000,
      end: request.range.to / 1000,
    });
    return found.map((text) => ({ text }));
  }

  async get(path, parameters) {
    const answer = await fetch(`${this.url}/api/v1/${path}?${new URLSearchParams(parameters)}`);
    const body = await answer.json();
    if (body.status !== 'success') {
      throw new Error(body.error);
    }
    return body.data;
  }
}

/** Values at the times that were asked for; null where the series has none, so that a gap is a gap. */
function line(target, { metric, values, value }, step) {
  const points = values ?? [value];
  const times = [];
  const numbers = [];
  for (const [time, text] of points) {
    while (times.length && time - times.at(-1) / 1000 > 1.5 * step) {
      times.push(times.at(-1) + step * 1000);
      numbers.push(null);
    }
    times.push(time * 1000);
    numbers.push(number(text));
  }
  const displayNameFromDS = target.legendFormat ? renderLegendFormat(target.legendFormat, metric) : labelled(metric);
  return toDataFrame({
    refId: target.refId,
    name: displayNameFromDS,
    fields: [
      { name: 'Time', type: FieldType.time, values: times },
      { name: 'Value', type: FieldType.number, values: numbers, labels: metric, config: { displayNameFromDS } },
    ],
  });
}

/** One row a series, one column a label. */
function table(target, result) {
  const labels = [...new Set(result.flatMap(({ metric }) => Object.keys(metric)))].sort();
  const column = (name) => ({ name, type: FieldType.string, values: result.map(({ metric }) => metric[name] ?? '') });
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: result.map(({ value }) => value[0] * 1000) },
      ...labels.map(column),
      { name: 'Value', type: FieldType.number, values: result.map(({ value }) => number(value[1])) },
    ],
  });
}

/** Values above zero at most a step apart are one event; with `useValueForTime` each value is the time of one. */
function events(mark, frame) {
  const [times, values] = frame.fields.map((field) => field.values);
  const { labels } = frame.fields[1];
  const step = rangeUtil.intervalToSeconds(mark.step ?? '60s') * 1000;
  const found = [];
  times.forEach((time, i) => {
    const at = mark.useValueForTime ? Math.floor(values[i]) : time;
    if (!(values[i] > 0)) {
      return;
    }
    if (found.length && found.at(-1).timeEnd + step >= at) {
      found.at(-1).timeEnd = at;
    } else {
      found.push({ time: at, timeEnd: at, title: renderLegendFormat(mark.titleFormat ?? '', labels), color: mark.iconColor });
    }
  });
  return found;
}
