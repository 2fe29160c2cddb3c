// A dashboard's JSON as a scene: its variables, annotations and grid; each panel with its queries.
import {
  DataSourceVariable, EmbeddedScene, QueryVariable, SceneControlsSpacer, SceneDataLayerSet, SceneDataTransformer,
  SceneGridItem, SceneGridLayout, SceneGridRow, SceneQueryRunner, SceneTimePicker, SceneTimeRange, SceneVariableSet,
  VariableValueSelectors, VizPanel, dataLayers,
} from '@grafana/scenes';

/** `chosen` gives the values of a variable, as a list, or none. */
function variable(model, chosen) {
  const common = { name: model.name, label: model.label, hide: model.hide };
  if (model.type === 'datasource') {
    return new DataSourceVariable({ ...common, pluginId: model.query, value: 'prometheus', text: 'Prometheus' });
  }
  if (model.type !== 'query') {
    throw new Error(`a variable of the type ${model.type} is not drawn here: add it to tools/frontend/src/scene.js`);
  }
  const values = chosen.length ? chosen : [model.current?.value ?? ''].flat();
  const value = model.multi ? values : values[0];
  return new QueryVariable({
    ...common, query: model.query, datasource: model.datasource, refresh: model.refresh, sort: model.sort,
    regex: model.regex ?? '', isMulti: model.multi, includeAll: model.includeAll, allValue: model.allValue, value, text: value,
  });
}

function panel(model) {
  const queries = new SceneQueryRunner({ datasource: model.datasource, queries: model.targets, minInterval: model.interval });
  const { x, y, w, h } = model.gridPos;
  return new SceneGridItem({
    x, y, width: w, height: h,
    body: new VizPanel({
      key: `panel-${model.id}`, title: model.title, description: model.description, pluginId: model.type,
      options: model.options ?? {}, fieldConfig: model.fieldConfig,
      $data: model.transformations?.length
        ? new SceneDataTransformer({ $data: queries, transformations: model.transformations })
        : queries,
    }),
  });
}

/** Panels under the row that stands above them; `rows` are the titles of those to draw, all if there are none. */
function grid(panels, rows) {
  const children = [];
  let shown = !rows.length;
  for (const model of panels) {
    if (model.type === 'row') {
      shown = !rows.length || rows.includes(model.title);
    }
    if (shown) {
      const heading = () => new SceneGridRow({ title: model.title, y: model.gridPos.y, isCollapsible: false, children: [] });
      children.push(model.type === 'row' ? heading() : panel(model));
    }
  }
  return new SceneGridLayout({ isDraggable: false, isLazy: false, children });
}

/** The dashboard over a time ("now-1h", or milliseconds), with what is chosen for its variables. */
export function scene(model, { from, to, chosen, rows }) {
  const marks = model.annotations.list.filter((query) => !query.builtIn);
  return new EmbeddedScene({
    $timeRange: new SceneTimeRange({ from, to, timeZone: 'utc' }),
    $variables: new SceneVariableSet({ variables: model.templating.list.map((one) => variable(one, chosen(one.name))) }),
    $data: new SceneDataLayerSet({
      layers: marks.map((query) => new dataLayers.AnnotationsDataLayer({ name: query.name, query, isEnabled: query.enable })),
    }),
    controls: [new VariableValueSelectors({}), new SceneControlsSpacer(), new SceneTimePicker({ isOnCanvas: true })],
    body: grid(model.panels, rows),
  });
}
